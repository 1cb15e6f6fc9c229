"""What authors build with: attention, parallel layers, ParallelContext, registration."""
