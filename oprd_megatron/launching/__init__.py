"""From what somebody types to ranks: on this machine, on many nodes, or on paper."""
