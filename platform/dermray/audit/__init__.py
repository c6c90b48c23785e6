"""What is in a corpus and should not be: equal images, and images of training that an evaluation holds as well."""
