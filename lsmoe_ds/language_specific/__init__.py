"""Parameters that belong to languages, chosen by the ids of each sentence."""
