"""The functions between the products of an MLP."""
