//! What a disk may hold after a crash.

use std::ops::Range;

use bulbil_types::BLOCK_LEN;

const SECTORS: usize = BLOCK_LEN / 512;

/// Content of one block: a tag for each 512-byte sector; 0 is zeroes.
type Block = [u64; SECTORS];

/// Follows what was asked of a disk, and knows for each 4 KiB block every content that a crash may
/// leave: the last flushed one and each one written since, whole.
///
/// Sectors are filled with a tag, repeated; [`tagged`] makes one.
#[derive(Debug, Clone)]
pub struct DiskOracle {
    /// For each block the possible contents, the newest last; never empty.
    blocks: Vec<Vec<Block>>,
    /// Blocks of the write that perhaps was not answered.
    in_flight: Range<usize>,
}

impl DiskOracle {
    /// A disk with this content, all of it durable.
    ///
    /// # Panics
    /// If a sector of `content` is not filled with one tag.
    #[must_use]
    pub fn new(content: &[u8]) -> Self {
        let blocks = content.chunks(BLOCK_LEN).map(|block| vec![parse(block).expect("tagged")]).collect();
        Self { blocks, in_flight: 0..0 }
    }

    /// Notes that sectors were asked to be filled with `tag`; called before the request is made.
    pub fn write(&mut self, first_sector: u64, sectors: u64, tag: u64) {
        let (first, end) = (first_sector as usize, (first_sector + sectors) as usize);
        for block in first / SECTORS..end.div_ceil(SECTORS) {
            let mut content = *self.blocks[block].last().unwrap();
            for (sector, slot) in content.iter_mut().enumerate() {
                if (first..end).contains(&(block * SECTORS + sector)) {
                    *slot = tag;
                }
            }
            self.blocks[block].push(content);
        }
        self.in_flight = first / SECTORS..end.div_ceil(SECTORS);
    }

    /// Notes that every write noted so far was answered; a new write says that of those before it.
    pub fn answered(&mut self) {
        self.in_flight = 0..0;
    }

    /// Notes what a write that was noted last and failed has left: each block of `content`, from this block on, is as
    /// before or as it was to be.
    ///
    /// # Errors
    /// A sentence about the first block that is neither.
    pub fn write_failed(&mut self, first_block: u64, content: &[u8]) -> Result<(), String> {
        self.answered();
        for (number, block) in (first_block as usize..).zip(content.chunks(BLOCK_LEN)) {
            let found = parse(block).map_err(|sector| format!("block {number}: sector {sector} is torn"))?;
            let possible = &mut self.blocks[number];
            if !possible[possible.len().saturating_sub(2)..].contains(&found) {
                return Err(format!("block {number} holds {found:x?} after a failed write, possible: {possible:x?}"));
            }
            possible.push(found);
        }
        Ok(())
    }

    /// Notes that a flush was acknowledged that began after every write noted so far.
    pub fn flushed(&mut self) {
        self.answered();
        for possible in &mut self.blocks {
            possible.drain(..possible.len() - 1);
        }
    }

    /// Notes that the disk has grown by blocks of zeroes.
    pub fn grow(&mut self, blocks: u64) {
        self.blocks.extend((0..blocks).map(|_| vec![[0; SECTORS]]));
    }

    /// The content that the disk has while it runs.
    #[must_use]
    pub fn newest(&self) -> Vec<u8> {
        let newest = self.blocks.iter().flat_map(|possible| possible.last().unwrap());
        newest.flat_map(|tag| tagged(*tag, 1)).collect()
    }

    /// Checks the disk while it runs: every block holds the newest content.
    ///
    /// # Errors
    /// A sentence about the first block that does not.
    pub fn check_running(&self, content: &[u8]) -> Result<(), String> {
        self.check(content, |_, possible, found| possible.last() == Some(found))
    }

    /// Checks the disk after its process was killed and the host went on: every write that was answered is
    /// there, flushed or not. What is found is what the disk holds from now on.
    ///
    /// # Errors
    /// A sentence about the first block that holds something else.
    pub fn check_after_kill(&mut self, content: &[u8]) -> Result<(), String> {
        self.check(content, |number, possible, found| {
            let unanswered = self.in_flight.contains(&number) && possible.iter().rev().nth(1) == Some(found);
            possible.last() == Some(found) || unanswered
        })?;
        *self = Self::new(content);
        Ok(())
    }

    /// Checks the disk after a crash; what is found is what the disk holds from now on.
    ///
    /// # Errors
    /// A sentence about the first block that holds something that was lost, torn or never there.
    pub fn check_after_crash(&mut self, content: &[u8]) -> Result<(), String> {
        self.check(content, |_, possible, found| possible.contains(found))?;
        *self = Self::new(content);
        Ok(())
    }

    fn check(&self, content: &[u8], allowed: impl Fn(usize, &[Block], &Block) -> bool) -> Result<(), String> {
        assert_eq!(content.len(), self.blocks.len() * BLOCK_LEN);
        for (number, (block, possible)) in content.chunks(BLOCK_LEN).zip(&self.blocks).enumerate() {
            let found = parse(block).map_err(|sector| format!("block {number}: sector {sector} is torn"))?;
            if !allowed(number, possible, &found) {
                return Err(format!("block {number} holds {found:x?}, possible were {possible:x?}"));
            }
        }
        Ok(())
    }
}

/// Fills `sectors` sectors with a tag.
#[must_use]
pub fn tagged(tag: u64, sectors: usize) -> Vec<u8> {
    tag.to_le_bytes().repeat(sectors * 512 / 8)
}

/// Reads the tags of a block; the error is a sector that holds more than one.
fn parse(block: &[u8]) -> Result<Block, usize> {
    let mut tags = [0; SECTORS];
    for (number, sector) in block.chunks(512).enumerate() {
        let (words, _) = sector.as_chunks::<8>();
        if words.iter().any(|word| word != &words[0]) {
            return Err(number);
        }
        tags[number] = u64::from_le_bytes(words[0]);
    }
    Ok(tags)
}
