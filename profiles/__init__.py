"""What devices are: `probe` looks at the machine at hand, `profile` reads the `*.toml` files of this folder."""
