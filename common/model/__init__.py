"""The frozen backbone, its adapter, attention, and the open session that holds them."""
