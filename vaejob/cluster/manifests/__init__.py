"""What a cluster applies to run a job, made from the job's configuration, and checked as the cluster would; no Ray here."""
