"""One loop for every stage that trains. It knows rows, weights and losses, and no algorithm."""
