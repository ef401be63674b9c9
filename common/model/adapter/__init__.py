"""FA-LoRA: what is trained, and how it lies in memory and on the wire."""
