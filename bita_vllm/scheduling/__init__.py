"""How many rows each request has in a step: the scheduler, its rules, and what they follow while serving."""
