"""python -m vaejob is the vaejob command."""

from vaejob.cli import main

main()
