"""Renderers: render state in, frames out, batched."""
