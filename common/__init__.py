"""What both sides share: data, model, training, privacy, wire contract."""
