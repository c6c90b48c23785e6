"""What a model passes before people use it: golden answers, the gate of scores, promotion, and what is thrown away."""
