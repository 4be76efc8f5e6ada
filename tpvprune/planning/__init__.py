"""What goes: trace a network into a `Graph`, and turn scores into a `Plan` under a budget."""
