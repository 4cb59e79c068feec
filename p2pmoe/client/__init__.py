"""What a trainer does: find, call, mix."""
