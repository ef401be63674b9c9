"""Hospital side: the Flower ClientApp and the local update it runs."""
