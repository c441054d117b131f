"""Fine-tunings as long as users make them: whole data sets, several epochs, published weights; resumable for days."""
