"""TensorBoard event files: numbers, pictures and histograms over images_seen, as the bytes of one file."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboardX.record_writer import RecordWriter

from vaejob.pictures.grid import png_bytes

BINS = 30


class Shown(NamedTuple):
    """One point of one card. TensorBoard keeps numbers in float32, steps as integers of 64 bits."""

    tag: str
    value: float | Image.Image | NDArray[np.float64]
    """A number, a picture, or the values of a histogram."""
    images_seen: int
    wall_time: float
    """Seconds since 1970."""
    words: str = ""
    """What the card is of; TensorBoard shows it beside the title."""


def event_file(shown: Iterable[Shown]) -> bytes:
    """In the order of progress, since TensorBoard drops what comes before a smaller step."""
    points = sorted(shown, key=lambda point: point.images_seen)
    began = min((point.wall_time for point in points), default=0.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events"
        writer = RecordWriter(str(path))
        writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
        for point in points:
            event = Event(wall_time=point.wall_time, step=point.images_seen, summary=Summary(value=[_value(point)]))
            writer.write(event.SerializeToString())
        writer.close()
        return path.read_bytes()


def _value(point: Shown) -> Summary.Value:
    metadata = SummaryMetadata(summary_description=point.words)
    match point.value:
        case Image.Image() as picture:
            image = Summary.Image(
                height=picture.height,
                width=picture.width,
                colorspace=len(picture.getbands()),
                encoded_image_string=png_bytes(picture),
            )
            return Summary.Value(tag=point.tag, image=image, metadata=metadata)
        case np.ndarray() as values:
            return Summary.Value(tag=point.tag, histo=_histogram(values), metadata=metadata)
        case number:
            return Summary.Value(tag=point.tag, simple_value=number, metadata=metadata)


def _histogram(values: NDArray[np.float64]) -> HistogramProto:
    """Counts in equal bins over the finite values; of none, an empty one."""
    values = values[np.isfinite(values)].astype(np.float64)
    if not values.size:
        return HistogramProto()
    counts, edges = np.histogram(values, bins=BINS)
    return HistogramProto(
        min=values.min(),
        max=values.max(),
        num=values.size,
        sum=values.sum(),
        sum_squares=(values**2).sum(),
        # TensorBoard's bucket i ends at limit i and begins at the one before; so the first edge ends an empty bucket.
        bucket_limit=edges.tolist(),
        bucket=[0.0, *counts.tolist()],
    )
