"""A loaded model behind a small page and a JSON API: for looking at it, not for crowds."""
