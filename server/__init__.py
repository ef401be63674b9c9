"""Server side: the Flower ServerApp, aggregation and rounds."""
