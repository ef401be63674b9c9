"""Flower as we start it: SuperLink, app bundle, deployment, worker count."""
