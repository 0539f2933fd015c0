"""What turns a trained checkpoint into something servable."""
