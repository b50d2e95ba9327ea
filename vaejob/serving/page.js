"use strict";

const at = (id) => document.getElementById(id);
let first = null; // the image that was dropped, as a data: address
let reconstructs = true;

async function ask(verb, question) {
  at("trouble").textContent = "";
  const reply = await fetch(`/api/${verb}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(question),
  });
  const found = await reply.json();
  if (!reply.ok) throw new Error(found.error);
  return found;
}

function show(id, images, names, captioned = false) {
  const pictures = images.map((source, place) => Object.assign(new Image(), { src: source, alt: names(place), title: names(place) }));
  at(id).replaceChildren(...(captioned ? pictures.map(withCaption) : pictures));
}

function withCaption(picture) {
  const figure = document.createElement("figure");
  figure.append(picture, Object.assign(document.createElement("figcaption"), { textContent: picture.alt }));
  return figure;
}

// Runs what was asked for; what goes wrong is said on the page.
function doing(button, work) {
  return async (...given) => {
    if (button) button.disabled = true;
    try {
      await work(...given);
    } catch (error) {
      at("trouble").textContent = error.message;
    } finally {
      if (button) button.disabled = false;
    }
  };
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

const sample = doing(at("sample"), async () => {
  const seed = Number(at("seed").value);
  const found = await ask("sample", { count: 16, seed, mean: at("mean").checked });
  show("samples", found.images, (place) => `sample ${place + 1} of seed ${seed}`);
});

const look = doing(null, async (file) => {
  if (!file) return;
  for (const id of ["reconstruction", "score", "interpolation"]) at(id).replaceChildren();
  at("last").disabled = true;
  first = await read(file);
  await judge();
  at("last").disabled = false;
});

async function judge() {
  if (reconstructs) {
    const made = await ask("reconstruct", { image: first });
    show("reconstruction", made.images, (place) => ["as the model sees it", "its reconstruction"][place], true);
  }
  const found = await ask("score", { image: first, samples: Number(at("count").value) });
  const bound = found.bound === "elbo" ? "-ELBO" : `-IWAE-${found.samples}`;
  const density = found.density ? ` (density + ${found.density_bits_correction.toFixed(4)})` : "";
  const changes = found.changed.length ? ` (${found.changed.join(", ")})` : "";
  at("score").textContent =
    `${bound}: ${found.negative_bound_nats.toFixed(3)} nats, ${found.bits_per_dim.toFixed(4)} bits/dim${density}${changes}`;
}

const go = doing(null, async (file) => {
  if (!file) return;
  const found = await ask("interpolate", { first, last: await read(file), steps: 8 });
  show("interpolation", found.images, (place) => `step ${place + 1} of 8`);
});

at("sample").addEventListener("click", sample);
at("file").addEventListener("change", (event) => look(event.target.files[0]));
at("last").addEventListener("change", (event) => go(event.target.files[0]));
at("count").addEventListener("change", doing(null, async () => { if (first) await judge(); }));
for (const kind of ["dragover", "dragleave", "drop"]) {
  at("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") look(event.dataTransfer.files[0]);
  });
}

fetch("/api/model").then((reply) => reply.json()).then((model) => {
  at("name").textContent = model.run;
  document.title = `${model.run} - vaejob`;
  at("about").textContent = model.lines.join(" · ");
  at("between").hidden = !model.interpolates;
  reconstructs = model.reconstructs;
  sample();
});
