"""What a node does with calls: batch, compute, train."""
