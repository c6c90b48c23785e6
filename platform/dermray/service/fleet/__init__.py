"""The processes of a service: encoder replicas, which version answers, how a new one is followed, ports, the end."""
