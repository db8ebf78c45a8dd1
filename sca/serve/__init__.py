"""HTTP server (`sca serve`) and the scheduler that batches the requests of its clients."""
