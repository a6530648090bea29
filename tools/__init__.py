"""Programs for people who work on the project; the server does not use them."""
