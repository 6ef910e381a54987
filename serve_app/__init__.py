"""Text to video as a service: Ray Serve deployments behind the `/v1/videos` API."""
