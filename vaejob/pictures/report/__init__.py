"""One self-contained page of one run or several: what is known of them, their curves and their pictures."""
