"""vaejob doctor: what a job will need is tried where it will run, before money is spent."""
