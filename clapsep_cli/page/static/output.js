// Plays blocks of samples of several parts from one clock, so that they cannot drift apart. Runs in the audio thread.

class Parts extends AudioWorkletProcessor {
  constructor({ processorOptions }) {
    super();
    this.size = processorOptions.size; // samples of a block
    this.blocks = new Map(); // by number: for each part, its one or two channels
    this.from = 0; // the sample that is heard
    this.begin = Infinity; // at this frame of the context
    this.end = Infinity;
    this.over = false;
    this.port.onmessage = ({ data }) => {
      if (data.block) this.blocks.set(data.number, data.block);
      if ('from' in data) [this.from, this.begin, this.end] = [data.from, data.begin, Infinity];
      if ('end' in data) this.end = data.end;
      if (data.over) this.over = true;
    };
  }

  process(inputs, outputs) {
    const first = Math.max(0, this.begin - currentFrame);
    const last = Math.min(outputs[0][0].length, this.end - currentFrame);
    let at = this.from + currentFrame + first - this.begin;
    for (let i = first; i < last; ) {
      const number = Math.floor(at / this.size);
      const offset = at - number * this.size;
      const count = Math.min(last - i, this.size - offset);
      const block = this.blocks.get(number);
      if (block) this.copy(block, offset, count, outputs, i); // otherwise silence, and the clock goes on
      i += count;
      at += count;
      if (offset + count === this.size) this.blocks.delete(number);
    }
    return !this.over;
  }

  copy(block, offset, count, outputs, i) {
    block.forEach((channels, part) => {
      outputs[part].forEach((out, side) => {
        const channel = channels[Math.min(side, channels.length - 1)];
        out.set(channel.subarray(offset, Math.min(offset + count, channel.length)), i);
      });
    });
  }
}

registerProcessor('parts', Parts);
