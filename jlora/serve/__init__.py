"""Serving: continuous batching over one base and many adapters, behind OpenAI's HTTP interface."""
