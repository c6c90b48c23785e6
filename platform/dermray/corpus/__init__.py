"""What a corpus is: schema, ontology, captions, manifest. Knows nothing of Ray, torch or MLflow."""
