"""Which rank holds what: pipeline layouts, and the pieces of every tensor."""
