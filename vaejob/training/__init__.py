"""The loop without Ray: worker, step, loop, evaluate, checkpoint, ledger."""
