"""What is lent to methods: copies, batches, the loss with its cost, the generator."""
