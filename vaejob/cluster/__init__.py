"""The only code that imports ray: worker, driver, jobs, evaluation."""
