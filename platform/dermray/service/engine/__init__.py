"""One loaded model at work: what may be asked of it, decoding, batches. No Ray, no HTTP."""
