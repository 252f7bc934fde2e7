"""A request's body as clients send it: its content coding, the parts of multipart, and the encodings inside them."""
