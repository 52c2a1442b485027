"""One growth: its steps, what may grow, how much of it, and the looks at it later."""
