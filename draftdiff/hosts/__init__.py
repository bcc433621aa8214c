"""What we need of our hosts and they do not promise: each private name once, each held by a contract test."""
