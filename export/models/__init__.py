"""Reference models: one file per architecture, plain torch, the definition every graph and engine is judged by."""
