"""Speed beside a peer or a floor, as a ratio; `gpu` is what to measure on a card."""
