"""What is in a corpus and should not be: images alike, and images of training that an evaluation holds as well."""
