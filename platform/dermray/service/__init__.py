"""The Ray Serve application: endpoints over HTTP, engines that ask models, and the processes that they run in.

Outermost first: `application` binds the deployments and `gateway` is the one that speaks HTTP; `http` (routes, who may
ask, bodies, the page), `fleet` (which version answers, in which processes), `engine` (decode, batch, forward).
`serve/app.py` is its entry.
"""
