"""One module per engine behind the protocol of `base`; `registry` finds them, `bundle` describes what they load."""
