"""`lsmoe convert`: write models in other forms, check them, and record the results."""
