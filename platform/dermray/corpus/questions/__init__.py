"""Questions and their answers, made of what a sample says: closed ones to score by, open ones to learn from."""
