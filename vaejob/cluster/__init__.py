"""The only code that imports ray: worker, driver, jobs, evaluation."""

import os

# Read as Ray is imported. Its native handler would take SIGTERM from ours once the cluster is joined, and abort.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
