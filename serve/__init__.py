"""The Serve application: HTTP schemas, admission, batching around the encoder, and the web page.

Start it from the repository root: `serve run serve.app:build model=URI`. Layers, outermost first: `admission` (limits,
headers, metrics), `routes` (endpoints), `schemas` and `payload` (what a request says), `backend` (the protocol that
routes speak), `replica` (decode, batch, forward).
"""
