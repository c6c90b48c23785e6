"""Requests and answers: routes, schemas, admission, tokens, bodies and the web page. No Ray, no torch."""
