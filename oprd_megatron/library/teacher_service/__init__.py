"""A teacher for trainers that only want its states: `frames` is what crosses the wire, `server` and `client` its two ends."""
