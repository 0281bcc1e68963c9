"""The systems that lensc is measured beside, each in an environment of its own; `lensc.bench.full_size` calls them.

A script here never imports lensc and is run by the Python of its rival's environment. `build` makes what the rival runs,
by the rival's own tools; `serve` answers lines on stdin with lines of JSON on stdout:

    (start)        {"ready": true, "load_seconds": 2.1}
    prefill 1024   {"what": "prefill 1024", "seconds": 14.2}
    decode 32      {"what": "decode 32", "seconds": 3.1}          32 steps after what was prefilled last
    quit
"""
